"""`python -m flashvsr_model` is the same as the command `flashvsr`."""
import sys

from .cli import main

sys.exit(main())
