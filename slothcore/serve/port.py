"""Where a server listens."""

import socket

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Port:
    """A port that is taken, though nobody is answered on it before the server begins: who comes earlier waits.

    Attributes:
        socket: to listen on.
        is_loopback: whether only programs on this machine reach it.
        url: what clients take as the base URL.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """
        Args:
            host: a name or address of this machine.
            port: 0: any that is free.
        Raises: OSError, in one sentence, if it cannot be had.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.socket = socket.socket(family, kind, protocol)
            try:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(address)
                # A port that is only bound, another process may bind as well; and one of the two would learn of it
                # when its model is loaded.
                self.socket.listen()
            except OSError:
                self.socket.close()
                raise
        except OSError as error:
            why = error.strerror or error
            raise OSError(f"port {port} of {host} cannot be had ({why}); choose another --port or --host") from error
        self.is_loopback = host in LOOPBACK
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.socket.getsockname()[1]}/v1"

    def close(self) -> None:
        """Give it back."""
        self.socket.close()
