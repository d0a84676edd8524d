"""Says, before anything is installed, what the build will miss, and how to get it. Standard library only."""

import importlib.util
import os
import shutil
import sys
import sysconfig

missing = []
if sys.version_info < (3, 10):  # noqa: UP036 - an older interpreter may well run this file
    missing.append(f"Python 3.10 or newer (this is {sys.version.split()[0]}); set PYTHON=python3.11")
if importlib.util.find_spec("ensurepip") is None:
    missing.append("the venv module's pip: apt-get install python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    missing.append("Python's headers: apt-get install python3-dev")
if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if compiler):
    missing.append("a C++ compiler: apt-get install g++")
if missing:
    sys.exit("pyadapt cannot be built here without:\n  " + "\n  ".join(missing))
