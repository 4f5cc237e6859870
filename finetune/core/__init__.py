"""Plain tools that know no model: errors, files, random draws, events, devices."""
