"""Adapter files of any trainer: inspect, convert, resize, merge, extract."""
