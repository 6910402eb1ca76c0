"""Tasks of edit quality for evaluation harnesses; each harness reads the files of its own."""
