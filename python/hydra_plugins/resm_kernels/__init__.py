"""Puts the configs of `resm_backends` on the search path of Hydra programs."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ResmKernelsSearchPath(SearchPathPlugin):
    """Appends, so that no config of the program or of the user is hidden."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add `resm_backends/config`."""
        search_path.append(provider="resm-kernels", path="pkg://resm_backends.config")
