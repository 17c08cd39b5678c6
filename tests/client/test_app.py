"""What the postman must not know."""

import subprocess
import sys


def test_the_postman_loads_neither_model_nor_data_nor_keys() -> None:
    code = "import sys, confide.client.app; print('\\n'.join(sys.modules))"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert "confide.client.postbox" in loaded
    strangers = {"torch", "transformers", "peft", "opacus", "datasets", "pyarrow"}
    assert strangers.isdisjoint(loaded)
    ours = {name for name in loaded if name.startswith("confide.client.")}
    assert ours == {"confide.client.app", "confide.client.postbox"}
    shared = {name.removeprefix("confide.common.") for name in loaded if name.startswith("confide.common.")}
    assert shared == {"canonical", "errors", "messages"}  # so neither common.crypto nor common.secagg
