# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Training, evaluation and plotting of models with Attention Residuals: the library under the commands."""
