"""First-party plugins, installed as ``megalm_plugins``. They import only ``megalm.api`` and libraries."""
