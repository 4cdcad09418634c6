"""The to-do list of `fastapi_app.py` with a web page that shows changes by others at once.

    EVENTFOLD_DATA=todo-data uvicorn --app-dir docs/examples fastapi_page:app

Open http://127.0.0.1:8000/ in two windows, add something in one of them and tick it off in the other. Restart the
server: both windows reconnect and show the changes that they missed.
"""

from pathlib import Path

from fastapi.responses import FileResponse
from fastapi_app import app

PAGE = Path(__file__).with_name("fastapi_page.html")


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE)
