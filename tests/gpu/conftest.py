"""What is not collected where Triton does not interpret: ``test_kernels.py`` runs it."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted.py"]
