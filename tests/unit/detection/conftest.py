"""Set up torch for tests as the child does for itself."""

import os

# See handlers/detection/__main__.py; to be set before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
