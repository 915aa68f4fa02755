"""Rows without their components along a few orthonormal directions."""

from fastguard.ops.project_out.op import project_out, project_out_

__all__ = ["project_out", "project_out_"]
