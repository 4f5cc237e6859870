"""The web page: `finetune ui`. It starts and reads ordinary runs; it needs the extra `ui`."""
