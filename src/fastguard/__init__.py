"""fastguard: fused kernels and drop-in modules that immunize open-weight models against harmful fine-tuning."""

__version__ = "0.1.0"
