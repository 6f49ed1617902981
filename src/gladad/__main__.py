"""``python -m gladad``."""

from __future__ import annotations

import sys

from gladad.cli.main import main

sys.exit(main())
