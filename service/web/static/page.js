// What moves: parts of the page that the worker sends when they change, and how long ago things were.
"use strict";
(() => {
  const address = document.body.dataset.events;
  const lamp = document.getElementById("live");
  const serverNow = Date.parse(document.body.dataset.now || "");
  const drift = Number.isNaN(serverNow) ? 0 : serverNow - Date.now();
  const waiting = new Map();
  let source = null;

  // As service/show.py says it.
  function ago(time) {
    const seconds = Math.max(0, (Date.now() + drift - Date.parse(time)) / 1000);
    for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
      if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
    }
    return `${Math.floor(seconds)} s ago`;
  }

  function tick() {
    for (const time of document.querySelectorAll("time[data-ago]")) {
      const text = ago(time.dateTime);
      if (time.textContent !== text) time.textContent = text;
    }
  }

  // Whoever reads, copies or has the keyboard there is not disturbed: the part comes as soon as that is over.
  function inUse(part) {
    if (part.contains(document.activeElement) && document.activeElement !== document.body) return true;
    const selection = document.getSelection();
    return selection && !selection.isCollapsed && selection.containsNode(part, true);
  }

  function atEnd(box) {
    return box.scrollTop + box.clientHeight >= box.scrollHeight - 4;
  }

  function put() {
    for (const [name, html] of waiting) {
      let done = true;
      for (const part of document.querySelectorAll(`[data-live="${CSS.escape(name)}"]`)) {
        if (inUse(part)) {
          done = false;
          continue;
        }
        const boxes = [...part.querySelectorAll("[tabindex]")].map((box) => [box.scrollLeft, box.scrollTop, atEnd(box)]);
        part.innerHTML = html;
        part.querySelectorAll("[tabindex]").forEach((box, place) => {
          if (!boxes[place]) return;
          box.scrollLeft = boxes[place][0];
          // Who reads further up stays there; who reads the newest line sees the next one.
          box.scrollTop = boxes[place][2] ? box.scrollHeight : boxes[place][1];
        });
      }
      if (done) waiting.delete(name);
    }
    tick();
  }

  function say(text) {
    if (lamp.textContent !== text) lamp.textContent = text;
  }

  function open() {
    if (source || document.hidden) return;
    source = new EventSource(address);
    source.onopen = () => say("Live");
    source.onmessage = (message) => {
      for (const [name, html] of Object.entries(JSON.parse(message.data))) waiting.set(name, html);
      put();
    };
    source.onerror = () => {
      // A refusal is final (too many look, or the worker is gone); a broken connection is tried again.
      if (source.readyState === EventSource.CLOSED) {
        source = null;
        say("Not live: reload to see changes");
        setTimeout(open, 30000);
      } else {
        say("Connecting…");
      }
    };
  }

  for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
  setInterval(tick, 10000);
  if (!address) return;
  document.addEventListener("focusout", () => setTimeout(put));
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) open();
    else if (source) {
      source.close();
      source = null;
    }
  });
  addEventListener("pageshow", open);
  open();
})();
