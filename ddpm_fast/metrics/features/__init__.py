"""Feature extractors: networks that turn images into the vectors that metrics compare."""
