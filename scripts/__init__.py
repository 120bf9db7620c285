# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The commands, installed as `attnres_commands`."""
