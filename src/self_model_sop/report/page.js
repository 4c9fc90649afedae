(() => {
  const root = document.documentElement;
  const use = lang => { root.dataset.lang = root.lang = lang; };
  if (root.dataset.auto) use((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
  for (const button of document.querySelectorAll("[data-set]")) button.addEventListener("click", () => use(button.dataset.set));
  const tip = document.getElementById("tip");
  document.addEventListener("mousemove", event => {
    const target = event.target.closest("[data-tip]");
    tip.classList.toggle("on", Boolean(target));
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const y = event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18;
    tip.style.transform = `translate(${x}px, ${y}px)`;
  });
  tip.style.left = tip.style.top = "0";
})();
