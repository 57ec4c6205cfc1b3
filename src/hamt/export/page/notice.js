// A script without imports: it runs even where those of the page may not.
"use strict";

/** Say what went wrong, where it is seen. */
function tell(trouble) {
  const notice = document.getElementById("notice");
  notice.textContent = trouble;
  notice.hidden = false;
  document.getElementById("status").textContent = "Not running.";
  document.getElementById("progress").hidden = true;
}

function cannotRun() {
  tell("The page cannot run: one of its files is missing, or the browser is older than " +
    "Chromium 111, Firefox 121 or Safari 16.4.");
}

if (location.protocol === "file:") {
  tell("Opened as a file, this page can be looked at, but not run: browsers let no " +
    "file load scripts, WebAssembly or a model from beside it. Serve its folder, for instance by " +
    "python -m http.server --bind 127.0.0.1, and open the address that this prints.");
} else {
  addEventListener("error", cannotRun);  // it cannot be understood; app.js takes this back
  document.querySelector("[type=module]").addEventListener("error", cannotRun);  // it is not there
}
