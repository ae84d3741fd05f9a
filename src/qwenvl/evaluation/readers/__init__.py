"""Who reads the files of benchmarks: the reference's converted ones, and their owners' own."""
