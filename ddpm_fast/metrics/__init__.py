"""What samples are worth: how a set of images compares with another."""
