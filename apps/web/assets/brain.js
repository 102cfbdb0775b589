// Shared by the components of the brain page; loaded once, from the document's head.
"use strict";
window.ennBrain = (() => {
  // The session is remembered by the tab, so that loading the page again keeps the scans; the site
  // profile is remembered by the browser.
  const remembered = () => {
    try {
      return JSON.stringify({
        session: sessionStorage.getItem("enn-brain-session") || "",
        site: localStorage.getItem("enn-brain-site") || "",
      });
    } catch { return "{}"; } // private mode
  };
  const keepSession = (token) => {
    try { sessionStorage.setItem("enn-brain-session", token); } catch { /* private mode */ }
  };
  window.enn.remember = (name) => {
    try { localStorage.setItem("enn-brain-site", name); } catch { /* private mode */ }
  };

  // What the stage wants shown, for the viewer whenever that is ready.
  let show = () => {}, wanted = null;
  const view = (facts) => { wanted = facts; show(facts); };
  const viewer = (handler) => { show = handler; if (wanted) show(wanted); };

  return { remembered, keepSession, view, viewer };
})();
