"""The residual add, a projection and the norm that follows it, in one pass over the stream."""

from fastguard.ops.add_project_rms_norm.op import add_project_rms_norm

__all__ = ["add_project_rms_norm"]
