# SPDX-License-Identifier: Apache-2.0
from kdkernels.cli import main

raise SystemExit(main())
