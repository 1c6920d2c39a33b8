"""What goes wrong, as the error objects that clients of OpenAI's protocol know."""

from typing import Any

from starlette.responses import JSONResponse

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"


class ApiError(Exception):
    """Ends a request with an error object.

    Attributes:
        status: of the response.
        message: one sentence.
        code: a word that programs may look for.
        param: the field of the request that it is about.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def as_json(self) -> dict[str, Any]:
        """The body of the response; the same goes into a stream that has begun."""
        kind = SERVER_ERROR if self.status >= 500 else INVALID_REQUEST
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response that tells it."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.as_json(), self.status, headers)


def wrong(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be meant so."""
    return ApiError(400, message, param=param, code=code)
