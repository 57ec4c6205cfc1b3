// A script without imports: it runs even where those of the page may not.
"use strict";
if (location.protocol === "file:") {
  const notice = document.getElementById("notice");
  notice.textContent = "Opened as a file, this page can be looked at, but not run: browsers let no " +
    "file load scripts, WebAssembly or a model from beside it. Serve its folder, for instance by " +
    "python -m http.server --bind 127.0.0.1, and open the address that this prints.";
  notice.hidden = false;
  document.getElementById("status").textContent = "Not running.";
  document.getElementById("progress").hidden = true;
}
