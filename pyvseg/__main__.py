# SPDX-License-Identifier: Apache-2.0
import sys

from pyvseg.cli.main import main

sys.exit(main())
