"""`python -m lowbit_optim` is `lowbit-optim`."""

import sys

from lowbit_optim.cli import main

sys.exit(main())
