"""The moments of BatchNormalization layers in a pass over data."""
