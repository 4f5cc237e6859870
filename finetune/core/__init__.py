"""Tools that are independent of any model: errors, files, random numbers, events, devices."""
