"""What each kind of layer is: a file for each group of kinds, a class for each kind. :func:`.registry.kind_of` gives
the kind of a layer.
"""
