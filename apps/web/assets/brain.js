// Shared by the components of the brain page; loaded once, from the document's head.
"use strict";
window.ennBrain = (() => {
  // The session is remembered by the tab, so that loading the page again keeps the scans; the site
  // profile is remembered by the browser.
  const tab = window.enn.marks.newId();
  const remembered = () => {
    try {
      return JSON.stringify({
        session: sessionStorage.getItem("enn-brain-session") || "",
        tab,
        site: localStorage.getItem("enn-brain-site") || "",
      });
    } catch { return JSON.stringify({ tab }); } // private mode
  };
  let open = "", opened = null;
  const tellOpen = () => { if (open && opened) { opened(open); opened = null; } };
  const whenOpen = (handler) => { opened = handler; tellOpen(); };
  const keepSession = (token) => {
    open = token;
    try { sessionStorage.setItem("enn-brain-session", token); } catch { /* private mode */ }
    tellOpen();
  };

  // A lesson waits in the tab until it is answered. After an outage it is sent again: its id tells
  // the server whether it was learned.
  const LESSON = "enn-brain-lesson";
  const hold = (lesson) => {
    try { sessionStorage.setItem(LESSON, JSON.stringify({ ...lesson, session: open })); }
    catch { /* private mode */ }
  };
  const held = () => {
    try { return JSON.parse(sessionStorage.getItem(LESSON) || "null"); } catch { return null; }
  };
  const release = () => {
    try { sessionStorage.removeItem(LESSON); } catch { /* private mode */ }
  };
  window.enn.remember = (name) => {
    try { localStorage.setItem("enn-brain-site", name); } catch { /* private mode */ }
  };

  // Scans of a tab that is closed go soon.
  window.addEventListener("pagehide", () => {
    if (!open) return;
    const body = new Blob([JSON.stringify({ tab, session: open })], { type: "application/json" });
    navigator.sendBeacon(new URL("brain/left", document.baseURI), body);
  });

  // What the stage wants shown, for the viewer whenever that is ready.
  let show = () => {}, wanted = null;
  const view = (facts) => { wanted = facts; show(facts); };
  const viewer = (handler) => { show = handler; if (wanted) show(wanted); };

  return { remembered, keepSession, whenOpen, hold, held, release, view, viewer };
})();
