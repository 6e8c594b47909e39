"use strict";
(() => {
  const tip = document.getElementById("tip");
  const places = new WeakMap(); // of the keyboard, by plot
  const show = (mark, x, y) => {
    tip.textContent = mark.dataset.t;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const within = (event, selector) => (event.target instanceof Element ? event.target.closest(selector) : null);
  const leave = (plot) => {
    for (const mark of plot.querySelectorAll(".now")) mark.classList.remove("now");
    hide();
  };
  const stay = (plot, at) => {
    const mark = plot.querySelectorAll(".m")[at];
    if (!mark) return;
    mark.classList.add("now");
    const box = mark.getBoundingClientRect();
    show(mark, box.left + box.width / 2, box.top + box.height / 2);
  };
  // On the document and not on the plots, which a live page replaces.
  const point = (event) => {
    const mark = within(event, ".plot .m");
    if (mark) show(mark, event.clientX, event.clientY);
    else if (within(event, ".plot") || !document.querySelector(".plot .now")) hide();
  };
  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("focusout", (event) => {
    const plot = within(event, ".plot");
    if (plot) leave(plot);
  });
  document.addEventListener("keydown", (event) => {
    const plot = within(event, ".plot");
    if (!plot) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const marks = plot.querySelectorAll(".m"), at = places.get(plot) ?? -1;
    if (event.key === "Escape") leave(plot);
    let next = at;
    if (step) next = at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length;
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = marks.length - 1;
    else return;
    if (!marks.length) return;
    event.preventDefault();
    leave(plot);
    places.set(plot, next);
    marks[next].scrollIntoView({ block: "nearest", inline: "nearest" });
    stay(plot, next);
  });
  document.addEventListener("renewed", () => {
    const plot = document.activeElement?.closest(".plot");
    if (plot && places.has(plot) && !tip.hidden) stay(plot, places.get(plot));
  });
})();
