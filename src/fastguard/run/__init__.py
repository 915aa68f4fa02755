"""A whole run from a configuration: streams of data, the one training loop, resumable stages, the pipeline."""
