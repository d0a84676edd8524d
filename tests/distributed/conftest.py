"""Helpers of these tests lie beside them and are imported by their names."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
