"""`python -m iwm_fast` is the same as `iwm`."""

from iwm_fast.cli import main

if __name__ == "__main__":
    main()
