"""`python -m resm_kernels`: the `resm` command."""

from resm_kernels.cli import main

raise SystemExit(main())
