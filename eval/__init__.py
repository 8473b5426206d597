import logging


# Before anything imports it, which peft does: it warns about kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
