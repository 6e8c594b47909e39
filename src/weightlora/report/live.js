"use strict";
// Asks for the page again and brings this one up to date, element by element: what is open, scrolled or focused stays so.
(() => {
  const EVERY = 2000, AGAIN = 5000; // ms between two looks; after one that failed
  const line = document.getElementById("live");
  let tag = "", timer = 0;
  const say = (text, lost) => {
    line.setAttribute("aria-live", lost ? "assertive" : "off"); // the time of every look is not worth hearing
    if (line.textContent !== text) line.textContent = text;
    line.classList.toggle("lost", lost);
  };
  const key = (node) => {
    if (node.nodeType !== 1) return "";
    if (node.id) return "#" + node.id;
    if (node.nodeName === "DETAILS") return node.querySelector("summary")?.textContent ?? "";
    return /^H\d$/.test(node.nodeName) ? node.textContent : "";
  };
  const same = (a, b) => a.nodeName === b.nodeName && key(a) === key(b);
  const renew = (old, fresh) => {
    if (old === line || old.isEqualNode(fresh)) return;
    if (old.nodeType !== 1) { old.nodeValue = fresh.nodeValue; return; }
    for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
    }
    let at = old.firstChild;
    for (const kid of fresh.childNodes) {
      let found = at;
      if (found && !same(found, kid)) {
        const firm = kid.nodeType === 1 && (key(kid) || kid.nodeName === "DL");
        while (found && !(firm && same(found, kid))) found = firm ? found.nextSibling : null;
      }
      if (!found) { old.insertBefore(document.importNode(kid, true), at); continue; }
      while (at !== found) { const gone = at; at = at.nextSibling; gone.remove(); }
      at = found.nextSibling;
      renew(found, kid);
    }
    while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
  };
  const look = async () => {
    clearTimeout(timer);
    let next = EVERY;
    if (!document.hidden) {
      try {
        const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
        if (answer.status === 200) {
          const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
          document.title = fresh.title;
          for (const part of ["header", "main", "footer"]) {
            renew(document.querySelector(part), fresh.querySelector(part));
          }
          tag = answer.headers.get("ETag") ?? "";
          document.dispatchEvent(new Event("renewed"));
          say("Up to date at " + new Date().toLocaleTimeString() + ".", false);
        } else if (answer.status !== 304) {
          throw new Error(answer.status);
        }
      } catch {
        say("No longer updated: `weightlora watch` has ended or does not answer.", true);
        tag = "";
        next = AGAIN;
      }
    }
    timer = setTimeout(look, next);
  };
  document.addEventListener("visibilitychange", look);
  look();
})();
