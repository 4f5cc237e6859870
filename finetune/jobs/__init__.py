"""Whole jobs, from photos to exports and a page; and the plan of one."""
