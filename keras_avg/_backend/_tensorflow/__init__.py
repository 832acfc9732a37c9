"""Parts of the file for TensorFlow."""
