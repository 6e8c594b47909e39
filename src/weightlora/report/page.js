"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (mark, x, y) => {
    tip.textContent = mark.dataset.t;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
  };
  const hide = () => { tip.hidden = true; };
  for (const plot of document.querySelectorAll(".plot")) {
    const marks = [...plot.querySelectorAll(".m")];
    let at = -1;
    const leave = () => {
      if (at >= 0) marks[at].classList.remove("now");
      hide();
    };
    const point = (event) => {
      const mark = event.target.closest(".m");
      if (mark) show(mark, event.clientX, event.clientY);
      else hide();
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") leave();
      let next = at;
      if (step) next = at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length;
      else if (event.key === "Home") next = 0;
      else if (event.key === "End") next = marks.length - 1;
      else return;
      if (!marks.length) return;
      event.preventDefault();
      leave();
      at = next;
      marks[at].classList.add("now");
      marks[at].scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = marks[at].getBoundingClientRect();
      show(marks[at], box.left + box.width / 2, box.top + box.height / 2);
    });
    plot.addEventListener("blur", leave);
  }
})();
