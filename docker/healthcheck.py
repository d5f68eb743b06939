"""Exit 0 if the Ray node of this container is alive and in touch with its head, otherwise 1.

Asks the node's own agent, which needs no token for this. Used by the image, compose.yaml and the
probes of the Kubernetes manifests; the image has neither curl nor wget.
"""

from __future__ import annotations

import os
import sys
import urllib.request

PORT = os.environ.get("RAY_AGENT_PORT", "52365")


def main() -> int:
    """Ask once; prints why the node is not healthy."""
    url = f"http://127.0.0.1:{PORT}/api/local_raylet_healthz"
    try:
        with urllib.request.urlopen(url, timeout=4) as response:
            answer = response.read().decode()
    except OSError as error:
        print(f"{url}: {error}")
        return 1
    print(answer)
    return 0 if answer == "success" else 1


if __name__ == "__main__":
    sys.exit(main())
