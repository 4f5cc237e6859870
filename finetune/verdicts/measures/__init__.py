"""The measures of a run. A new one is one new file in this folder."""
