#!/usr/bin/env python
"""Videos and captions in, a latents table out.

    list videos -> match captions -> plan clips (one row per clip) -> leave out what is done
    -> decode + VAE-encode + write (actor pool) -> text embeddings, once per distinct caption

A video that cannot be used becomes a row of the failures table. Stopped at any point, the same command goes on with the
rows that are missing.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import ray
from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, Workers, config_to_dict, config_to_yaml
