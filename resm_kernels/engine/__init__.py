"""The streaming engine: a plan from headers alone, and the pipeline that carries it out."""
