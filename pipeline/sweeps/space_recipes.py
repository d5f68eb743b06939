"""Named search spaces; the keys and texts are those of the command line, which may add to them.

The ranges lie around the official fine-tuning recipes (itpn_pixel/README, det and seg configs),
whose numbers are the recipes' defaults.
"""

from __future__ import annotations

import difflib

SPACES = {
    "lr": {"optim.lr": "loguniform:1e-5:3e-3"},
    "lr-decay": {
        "optim.lr": "loguniform:1e-5:3e-3",
        "optim.layer_decay": "choice:0.55,0.65,0.75,0.85,0.95",
    },
    "regularisation": {
        "optim.lr": "loguniform:1e-5:3e-3",
        "optim.layer_decay": "choice:0.55,0.65,0.75,0.85,0.95",
        "optim.weight_decay": "choice:0.02,0.05,0.1",
        "model.drop_path_rate": "uniform:0:0.3",
    },
    "neck": {"init.neck": "grid:true,false", "run.seed": "grid:0,1,2"},
}


def get_space(name: str) -> dict[str, str]:
    """Key -> text of a named space.

    Raises:
        ValueError: no such space; names the nearest one and all known ones.
    """
    if name not in SPACES:
        near = difflib.get_close_matches(name, SPACES, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(f"unknown space '{name}'{hint} Known: {', '.join(SPACES)}")
    return dict(SPACES[name])
