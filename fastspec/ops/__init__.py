"""The hot operations: one file each, with the argument checks, the PyTorch reference and the choice of backend."""

from fastspec.ops.propose import Proposer, propose
from fastspec.ops.verify import Verdict, Verifier, verify

__all__ = ["Proposer", "Verdict", "Verifier", "propose", "verify"]
