"""`python -m converters`: the same as the console script `jetspec-convert`."""

import sys

from converters.cli import main

sys.exit(main())
