"""One small demonstration a model; ``benchmarks.demo`` finds them by their files."""
