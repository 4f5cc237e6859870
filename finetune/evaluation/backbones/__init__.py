"""The networks that look at images. Each is one file with a subclass of `base.Backbone`."""
