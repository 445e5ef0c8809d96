"""`python -m service.cli` is `dltask`."""

from service.cli.main import main

if __name__ == "__main__":
    main()
